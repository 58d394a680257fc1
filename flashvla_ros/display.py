"""What a policy node shows people of each step: an overlay of every camera, and markers of the commanded motion."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from builtin_interfaces.msg import Time
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import Image
from visualization_msgs.msg import MarkerArray

from flashvla_ros.messages import image_message
from flashvla_ros.motion import Motion, marker_array
from mllm.overlay import Overlay
from mllm.policy import ActionStep, Observation, TokenLayout


def topic_of(camera: str) -> str:
    """The overlay's topic, relative to the node; what a ROS name cannot have becomes an underscore."""
    name = re.sub(r"\W", "_", camera, flags=re.ASCII)
    return f"overlay/{'_' if name[0].isdigit() else ''}{name}"


class Display:
    """Draws and publishes only what somebody subscribes to. One thread calls it, after the command is out.

    cameras: names in `Observation.images`.
    """

    def __init__(self, node: Node, cameras: Sequence[str], qos: QoSProfile) -> None:
        self._overlays = {name: node.create_publisher(Image, f"~/{topic_of(name)}", qos) for name in cameras}
        self._markers = node.create_publisher(MarkerArray, "~/markers", qos)
        self.begin(None)

    def begin(self, layout: TokenLayout | None) -> None:
        """Another policy. layout: of its tokens, if it has one."""
        self._overlay, self._motion = Overlay(layout), Motion()

    def clear(self) -> None:
        """A new episode."""
        self._overlay.clear()
        self._motion.clear()

    def overlay(self, step: ActionStep, observation: Observation, stamp: Time, frames: Mapping[str, str]) -> None:
        """frames: camera to show -> frame_id of its image. Raises PolicyError: the tokens are not the layout's."""
        badge = self._overlay.add(step)
        for camera, frame_id in frames.items():
            publisher = self._overlays[camera]
            if publisher.get_subscription_count():
                picture = self._overlay.draw(observation.images[camera], camera, badge)
                publisher.publish(image_message(picture, stamp, frame_id))

    def motion(
        self,
        displacement: np.ndarray,
        reused: bool,
        position: np.ndarray | None,
        stamp: Time,
        frame_id: str,
        limit: int,
    ) -> None:
        """See `Motion.add`. frame_id: of the commands."""
        self._motion.add(displacement, reused, position, limit)
        if self._markers.get_subscription_count():
            self._markers.publish(marker_array(self._motion.moves, stamp, frame_id))
