"""LIBERO: environments, rollouts, evaluation. May import `quant` and `mllm`; knows no ROS."""
