"""Servers that tests and benches start: real ones, on free ports of this machine, killed by their pid.

Importing a module needs none of the optional packages; starting a server whose program is not here is a
FileNotFoundError that says what to install.
"""
