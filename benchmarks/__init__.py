"""Benchmarks: real layer shapes and whole models beside their peers, in one run (`foveal bench`)."""
