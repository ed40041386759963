"""token_dwconv with strides, paddings, any kernel and channel multipliers, and its transpose."""
