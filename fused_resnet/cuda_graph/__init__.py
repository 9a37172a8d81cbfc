"""A whole training step as one CUDA graph."""

from fused_resnet.cuda_graph.graph_step import GraphStep, graph_step

__all__ = ["GraphStep", "graph_step"]
