"""A run on a disk and on a device: folder, log, checkpoint, signals, compiled and captured parts."""
