"""Net2Vec: how a classifier's filters encode concepts.

R. Fong, A. Vedaldi, "Net2Vec: Quantifying and Explaining how Concepts are Encoded by Filters in Deep Neural Networks", CVPR 2018. A concept
is whatever a data set has labels or masks for. Probes read stored activations, never the network: a single filter, or a learned weighted
combination of filters, segments the concept or tells the images that show it. The weights are the concept's vector.
"""
