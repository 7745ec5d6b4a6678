"""The five figures of NVIDIA's post on FP8 recipes, each as a page: what was measured, what was
published, and predictions for the rest.

`conf/experiment/fig1.yaml` to `fig5.yaml` name the cells of a figure.  `values` holds one number
with its label, `sources` finds the measured, published and predicted ones of a cell, `training`
makes figures 3 to 5 of them, `single` figures 1 and 2, whose data are GEMMs and loss curves;
`hypotheses` asks what would move the predictions of figure 4.
"""
