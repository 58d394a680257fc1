"""The vision-language-action policy: interface, model and decoding. May import `quant`; knows no simulator."""
