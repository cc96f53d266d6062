"""What operating a Ray cluster takes, whoever makes it."""

from __future__ import annotations

#: What every process of Ray on every node has in its environment.
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_timeout_ms_task_wait_for_death_info": "50",
    "RAY_core_worker_internal_heartbeat_ms": "100",
    "RAY_max_direct_call_object_size": "4194304",
    "RAY_worker_niceness": "0",
}
NODE_ENV = {**SETTINGS, "RAY_AUTH_MODE": "token"}
