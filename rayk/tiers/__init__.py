"""Host and disk tiers below a replica's device pages."""
