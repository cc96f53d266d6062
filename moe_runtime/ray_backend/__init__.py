"""The control plane on Ray: actors, their placement, and the controller that keeps them alive."""
