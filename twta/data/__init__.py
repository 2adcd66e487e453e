"""The data sets: found on disk, downloaded if absent, checked."""
