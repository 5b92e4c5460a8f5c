"""Benchmarks of real layer shapes and whole models against their peers (`foveal bench`)."""
