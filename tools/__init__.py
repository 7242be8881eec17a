"""What runs the project where it cannot be run every day: on a machine with a GPU."""
