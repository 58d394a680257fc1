"""A robot: camera, command gate and policy. The graph itself is data in flashvla_ros/graph.py.

ros2 launch flashvla_ros robot.launch.py source:=/dev/video0 policy:=hold config:=/path/to/my_robot.yaml
"""

from flashvla_ros.launching import describe


def generate_launch_description():
    return describe(
        "robot",
        arguments={
            "source": ("camera", "source", "device, video file, image folder or stream URL"),
            "policy": ("policy", "policy", "policy name"),
            "policy_options": ("policy", "policy_options", "JSON options of the policy"),
        },
    )
