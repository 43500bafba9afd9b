"""Units and files that ``ckptd install`` puts in place. ``@PYTHON@`` stands for the interpreter that installs them."""
