"""PagedKVCacheManager and its asynchronous form: pages by hand, in this process or on Ray."""
