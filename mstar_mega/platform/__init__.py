"""Devices, process groups and files: what differs from machine to machine."""
