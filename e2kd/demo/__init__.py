"""`e2kd demo`: real digits on a misleading background, and what each student learns from it."""
