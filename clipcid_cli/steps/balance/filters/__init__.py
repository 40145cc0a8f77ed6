"""What is dropped beside repeats, before they are searched, and how each of these drops reaches the keep list."""
