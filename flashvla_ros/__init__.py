"""ROS 2 nodes, launch graphs and the `flashvla` command. The only package that imports rclpy; may import all others."""
