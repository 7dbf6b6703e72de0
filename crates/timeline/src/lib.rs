//! Spans from the start of a pod to its first byte, as text and as SVG.
