"""Models: loading, anatomy, and the view through which every method meets one."""
