"""LIBERO in the loop: simulator bridge, command gate and policy. The graph itself is data in flashvla_ros/graph.py.

ros2 launch flashvla_ros libero.launch.py policy:=hold task:=3 rviz:=true
"""

from flashvla_ros.launching import describe


def generate_launch_description():
    return describe(
        "libero",
        arguments={
            "suite": ("sim_bridge", "suite", "LIBERO suite"),
            "task": ("sim_bridge", "task", "task index or instruction"),
            "init_state": ("sim_bridge", "init_state", "official initial state, or sampled or shuffled"),
            "mode": ("sim_bridge", "mode", "lockstep or realtime"),
            "policy": ("policy", "policy", "policy name"),
            "policy_options": ("policy", "policy_options", "JSON options of the policy"),
        },
    )
