"""Experts that are MoE layers themselves: of this runtime, or of another one."""
