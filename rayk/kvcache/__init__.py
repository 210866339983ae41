"""One replica's cache: pages, prefix tree, block tables, runtime inputs. No Ray, no threads, no clock."""
