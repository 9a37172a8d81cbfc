"""Who runs what: asked once for each shape, remembered until something that the answer depends on changes."""
