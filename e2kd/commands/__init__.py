"""The commands of `e2kd`: their options, and how they call the library."""
