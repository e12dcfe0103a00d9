"""Where each named axis of each parameter sits in each stored tensor: layouts, tables, extents."""
