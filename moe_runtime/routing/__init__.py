"""Routing: scores become assignments, a dispatch plan, and combined outputs; pure tensor functions."""
