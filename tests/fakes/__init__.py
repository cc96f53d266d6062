"""Fakes of the ports, shared by the tests."""
