"""Measuring: timings and peaks of memory, and the options that measurements share."""
