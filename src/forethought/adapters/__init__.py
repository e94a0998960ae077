"""Outside systems that Forethought works inside of: one file each, the only one that imports that system."""
