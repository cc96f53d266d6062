"""Ray and ZeroMQ without the runtime around them: the peers below its layers, and the only part that imports both."""
