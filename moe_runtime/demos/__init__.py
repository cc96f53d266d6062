"""What ``moe-runtime demo`` runs: whole uses of the runtime on real input, trained, served, called and checked."""
