"""How a raw example, an image file or a text, becomes what a network takes. Free of torch: it is deployed too."""
