"""From two lists of extents to bytes: plans of steps, and the workers that execute them."""
