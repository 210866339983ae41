"""A Cluster behind the OpenAI API: routes, streams, errors, limits (docs/serving.md). Needs the extra `server`."""
