"""What 2:4 and INT8 would gain on a GPU that need not be there: a roofline of each layer, from shapes."""
