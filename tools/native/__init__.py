"""Random problems for the C++ library, and a program that runs them under sanitizers and emulators."""
