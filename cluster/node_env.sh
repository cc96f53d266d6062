# The environment of every process of Ray, and of moe_runtime, on every node of a cluster. The cluster files ship it to
# ~/moe_runtime/env.sh; shells read it, and so do the commands that start Ray.

export PATH="$HOME/moe_runtime/venv/bin:$PATH"

# Whoever reaches Ray's ports runs code. Said explicitly: a process without the variable guesses from what it finds in
# ~/.ray, and one that guesses differently never joins. The token is in ~/.ray/auth_token.
export RAY_AUTH_MODE=token

# Nothing about the cluster is sent to anyone.
export RAY_USAGE_STATS_ENABLED=0

# A node that falls silent (cut off, or powered off) is declared dead after 5 questions without an answer: 5 to 8 s.
# Ray's own timings take 65 s, during which the node's experts are not started elsewhere. Only the head asks, but the
# settings of all nodes should be equal.
export RAY_health_check_initial_delay_ms=2000
export RAY_health_check_period_ms=500
export RAY_health_check_timeout_ms=1000
export RAY_health_check_failure_threshold=5

# A call to an actor that has died fails after 0.1 s instead of 1 to 2 s.
export RAY_timeout_ms_task_wait_for_death_info=50
export RAY_core_worker_internal_heartbeat_ms=100

# Results up to 4 MiB travel with the answer instead of through the object store (Ray's default is 100 KiB): 1 MiB
# across hosts takes 8 ms instead of 25. Caller and actor both need it, so every process has it.
export RAY_max_direct_call_object_size=4194304

# Ray lowers its workers' priority by 15, which lets any other process of the machine starve experts and routers.
export RAY_worker_niceness=0
