"""Channel permutation: channels in another order, so that N:M keeps more, while the dense model computes the same.

The inputs of a matrix are the outputs of other matrices. Reorder the rows of those and the columns of this one alike, and the
model's function is the same; but N:M groups of this one hold other inputs. Rows are not grouped, so the masks of the others
lose nothing. Three kinds of channels can move: the hidden ones of an MLP (``hidden``), the values of each attention head
(``heads``), and the residual stream, in one order for the whole model (``stream``).

Which of them may move is found by shape and then proved by running parts of the model (``trial``). An order is searched for on
scores (``sparsity.channel_order``), and the weights are reordered (``folding``) before anything is pruned: so the inputs of a
group lie side by side, and no later step needs to know.

After the channel permutation of RIA (Zhang et al., ICLR 2024), which reorders each matrix's inputs while the model runs; here
all orders are folded into the weights.
"""
