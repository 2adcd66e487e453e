"""The data sets: found on disk or downloaded, and checked."""
