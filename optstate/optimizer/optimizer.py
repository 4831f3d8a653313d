"""The optimizer: a chain and parameters become a plan, and the plan steps one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from optstate import naming
from optstate.distributed.placement import copy_part, here
from optstate.integrations.live_objects import import_apart, without_compiler
from optstate.kernels import Scalar
from optstate.kernels.backend import check_backend
from optstate.optimizer import loading, param_groups
from optstate.optimizer import state_dict as resume
from optstate.optimizer.averaged_weights import AveragedWeights
from optstate.optimizer.broken_step import STEP, InconsistentStateError
from optstate.optimizer.compiled_chain import ChainCompiler, require_compiler
from optstate.optimizer.device_clock import read_clock, start_clock
from optstate.optimizer.loading import Copy
from optstate.optimizer.parameters import HELD_ELEMENTS
from optstate.optimizer.plan import Plan
from optstate.optimizer.step_runner import StepRunner
from optstate.optimizer.tracked_parameters import TrackedParameters
from optstate.spec import is_fake
from optstate.updates import Chain, Route, Transform, as_route, schedule_free
from optstate.weights import Weights

__all__ = ["InconsistentStateError", "Optimizer"]


class Optimizer(torch.optim.Optimizer):
    """Steps parameters along a chain of transforms, with each statistic kept in the store the chain names.

    Args:
        params: `model.parameters()`, `model.named_parameters()`, or param groups. Names are needed by routes that
            match names and make messages and plans readable; a name decides how a weight is rounded at random, so
            each must be there once. What wrappers put into names (`module.`, `_orig_mod.`) is left out. A group may
            be empty, and hold any hyper-parameter of the recipe, `role` and `head_size`, which declare what its
            parameters are, and keys of others' (`lr_scale`). A route splits each group by chain.
        recipe: a chain, a single transform, or a route that picks a chain per parameter.
        lr: learning rate, a number or a 0-d tensor; multiplies the whole update, weight decay included.
        weights: how new values are written: "auto" (stochastic rounding for bf16 and fp16 parameters, else plain)
            or one of `optstate.weights`.

    State is created here, for every parameter that trains; `plan()` shows it. `state[p]` holds tensors under
    `<slot>` or `<slot>.<field>`, and the plain number `step`.

    Raises:
        TypeError, ValueError: for arguments that cannot be right, naming the value and what would be.
        RuntimeError: under `torch.inference_mode()`, whose tensors cannot be updated later.
    """

    made_for_fused_backward: ClassVar[bool] = False
    """Whether a recipe is to be fused into the backward pass unless that is turned off, as `optstate.estimate` assumes.
    A recipe that is a function may have such an attribute, too."""

    _averaged: AveragedWeights
    runner: StepRunner
    """What makes the steps; the hooks of a fused backward pass hold it, too."""

    def __init__(
        self,
        params: Iterable[Any],
        recipe: Transform | Route,
        lr: float | Tensor = 1e-3,
        *,
        weights: Weights | str = "auto",
    ) -> None:
        route = as_route(recipe)
        param_groups.refuse_inference_mode("building an optimizer")
        listed = param_groups.checked_params(params)
        names = naming.CanonicalNames(param_groups.names_in(listed))
        self.runner = StepRunner(self, TrackedParameters(route, weights, names))
        self._built = False
        shared = {} if route.rules else route.default.hyper
        super().__init__(listed, {"lr": lr, **shared})
        self._built = True
        self._share_defaults()
        resume.warn_if_unnamed(self.param_groups, self.runner.leaf)

    # --- parameters -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their state is created at once. A route makes one group for each chain it picks.

        Raises:
            TypeError, ValueError: for misspelled hyper-parameters, values out of range, names that are there already,
                and parameters that are not floating-point leaf tensors or are in a group already. Nothing is added
                then.
            RuntimeError: under `torch.inference_mode()`.
        """
        param_groups.refuse_inference_mode("adding parameters")
        if self._built:
            self.runner.follow()
        parameters = self.runner.parameters
        for part, plans in parameters.split_group(param_group, self.param_groups, self.defaults):
            parameters.name_empty_groups(part, self.param_groups)
            if not all(map(is_fake, part["params"])):  # what only describes a run may do without two seconds of imports
                import_apart("torch._dynamo")
            without_compiler(super().add_param_group)(part)
            parameters.adopt(len(self.param_groups) - 1, self.param_groups, self.state, plans)
        self.runner.ask_again()
        if self._built:
            self._share_defaults()
            resume.warn_if_unnamed(self.param_groups, self.runner.leaf)
        if self.runner.hooks is not None:
            self.runner.hooks.attach()

    def _share_defaults(self) -> None:
        """Make `defaults` what all groups share, which schedulers look at, and give it to empty groups."""
        if self.recipe.rules:
            self.defaults = self.runner.parameters.shared_defaults(self.defaults["lr"])
        for group in self.param_groups:
            if not group["params"]:
                group.update({key: value for key, value in self.defaults.items() if key not in group})

    @property
    def fused(self) -> Any:
        """The handle of `optstate.fuse_backward`, or None while updates happen in `step()`."""
        return self.runner.hooks.handle if self.runner.hooks is not None else None

    @property
    def recipe(self) -> Route:
        """The chain of each parameter, as given: pass it on to build the same optimizer for other parameters."""
        return self.runner.parameters.route

    def plan(self) -> Plan:
        """Return which chain, stores and bytes each parameter has, what was kept otherwise than asked, and why."""
        self.runner.follow()
        leaves = [(self.runner.leaf(param), param) for param in self.runner.params()]
        words = tuple(leaf.found_step(param.device).words for leaf, param in leaves)
        small = [
            leaf.plan.spec.numel for leaf, param in leaves if self.runner.hooks is not None and leaf.is_small(param)
        ]
        waiting, held = (len(small), min(sum(small), HELD_ELEMENTS)) if len(small) > 1 else (0, 0)
        return Plan(tuple(leaf.plan for leaf, _ in leaves), words, waiting, held)

    def state_nbytes(self) -> int:
        """Return the bytes of all state tensors that exist now on this device."""
        tensors = (here(v) for state in self.state.values() for v in state.values() if isinstance(v, Tensor))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def use_backend(self, backend: str) -> None:
        """Choose what makes the steps from now on; `plan()` tells what that is for each parameter.

        Args:
            backend: "auto", the best that is installed; "native", steps compiled for the CPU; "triton", steps in
                Triton for CUDA devices; "bitsandbytes", its kernels for moments in its 8-bit blocks; "eager", the
                transforms one after the other. The environment variable `OPTSTATE_BACKEND` is asked where this is
                "auto".

        Raises:
            ValueError: for another word, or for a backend that cannot be used here or for a parameter that trains.
        """
        check_backend(backend)
        self.runner.parameters.use_backend(backend)

    def compile(self) -> None:
        """Compile the steps of chains that no whole step knows, by PyTorch's inductor; `plan()` names them.

        Nothing is compiled here: each graph is when a step needs it first, with a line on stderr, which takes seconds.
        One graph serves all parameters of a kind, whatever their shapes; PyTorch keeps what it compiled on disk.
        Random bits are those of the transforms; numbers differ from theirs as sums are added in another order. What
        such a graph needs as temporaries is up to inductor, and at most what the plan says of the transforms.

        Raises:
            RuntimeError: if there is no C++ compiler.
        """
        require_compiler()
        self.runner.parameters.compile_with(ChainCompiler())

    def eval(self) -> None:
        """Make parameters hold the weights to evaluate with, where a chain averages weights (`updates.schedule_free`).

        Until `train()` the optimizer keeps a copy of the weights that are trained; it makes no step, and neither saves
        nor loads state. With all other chains nothing changes.

        Raises:
            InconsistentStateError: inside a step, or after one that broke off.
        """
        if not self.runner.consistency.evaluating and any(_averages(chain) for chain in self.recipe.chains):
            self.runner.consistency.require_whole("eval")
            self._averaged = AveragedWeights(self.runner)
            self.runner.consistency.evaluating = True
            self._averaged.show()

    def count_on_device(self) -> None:
        """Have steps counted on the device from now on, so that a CUDA graph may record `step()` and replay it.

        What follows from the number of a step, and from a learning rate that is a tensor on the device, is computed
        there. Give `lr` as such a tensor and fill it to change it under a graph; other hyper-parameters are recorded.
        A graph is recorded anew after loading. Every parameter must be stepped in Triton, as `plan()` tells.

        Replayed steps are taken over when the state is saved, or by `read_clock()`. A gradient that is not finite stops
        the update of its parameter in a replay, too, and that is said then.

        Raises:
            RuntimeError: with a fused backward pass, and for parameters on several devices or split among them. From
                `step()`, for a parameter whose step the transforms make.
        """
        start_clock(self.runner)

    def read_clock(self) -> None:
        """Wait for the device, and take over how many steps it made while a CUDA graph replayed them.

        Raises:
            NonFiniteGradientError: if gradients were not finite since the last call.
        """
        read_clock(self.runner)

    def train(self) -> None:
        """Make parameters hold the weights that are trained again, after `eval()`; and follow replaced parameters.

        Take over parameters that were replaced in the param groups, as accelerate's `prepare` does with FSDP2.

        `step()` does so, too. Called before the first backward, the whole parameters are freed by then, and a fused
        update begins with the first gradient. Transformers' Trainer calls this before every step.
        """
        if self.runner.consistency.evaluating:
            self._averaged.put_back()
            self.runner.consistency.evaluating = False
        self.runner.follow()

    # --- stepping ---------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that holds a gradient; fused, close the step that the backward pass has made.

        closure: evaluates the model again with gradients enabled and returns the loss, which is returned.

        Raises:
            NonFiniteGradientError: for an infinite or NaN gradient. The parameter it belongs to is unchanged; if
                others were already updated, the optimizer is inconsistent from then on.
            InconsistentStateError: if an earlier step broke off half-way, or if this one did as another process is
                gone, or late by more than the process group's timeout; then `__cause__` is what the backend said.
            RuntimeError: if parameters that are split among devices have a gradient on some of them only; nothing is
                changed. Fused, if no gradient arrived since the last step or hooks were lost.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        runner = self.runner
        consistency, hooks = runner.consistency, runner.hooks
        consistency.require_unbroken("step")
        if runner.replaced_by is not None:
            self._require_its_hooks()
        runner.require_ready()
        if runner.clip_of_original is not None:
            raise RuntimeError(
                f"this is a copy of an optimizer fused with clip_grad_norm={runner.clip_of_original}, but not fused: "
                "call optstate.fuse_backward(copy, ...) to say how it clips"
            )
        runner.refuse_bad_flags(wait=False)
        if hooks is not None:
            hooks.close_step()
        else:
            params = [param for param in runner.params() if param.grad is not None]
            runner.require_agreement(params, all_groups=True)
            consistency.begin(STEP)
            if runner.clock is not None:
                runner.clock.begin_step()
            runner.update_all(params, 1.0)
            if runner.clock is not None:
                runner.clock.close_step()
        runner.flags.close_step()
        consistency.close()
        return loss

    def _require_its_hooks(self) -> None:
        """Raise RuntimeError if a newer optimizer has taken the gradients of this one over."""
        reference = self.runner.replaced_by
        newer = reference() if reference is not None and self.runner.hooks is None else None
        if newer is not None and newer.active and not self.runner.consistency.updated:  # an open step may be closed
            raise RuntimeError(
                f"a newer {type(newer.optimizer).__name__} was fused over parameters of this optimizer and frees their "
                "gradients, so this one has none to step with: use the newer one, or call optstate.fuse_backward() on "
                "this one, which takes the hooks back"
            )

    def step_parameter(self, param: Tensor, grad_scale: Scalar = 1.0) -> None:
        """Update one parameter from its gradient. grad_scale: multiplies the gradient, as a global norm clip does."""
        self.runner.update(self.runner.leaf(param), param, grad_scale)

    def accept_partial_step(self) -> None:
        """Go on after a step that broke off: parameters keep what they have, updated or not.

        Gradients that the broken step used, and those that a fused backward was collecting, are dropped.
        """
        self.runner.drop_gradients(bool(self.runner.consistency.broken))
        self.runner.consistency.forget()

    # --- saving and loading -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's layout, plus the key `optstate` with the stores in use. Tensors, numbers and strings only.

        The tensors are the optimizer's own: copy or write them before the next step, in whichever thread that is.

        Raises:
            InconsistentStateError: if a step broke off half-way, or if a backward pass has updated parameters and
                `step()` did not follow.
            MovedStateError: if another thread updates a parameter meanwhile.
        """
        self.runner.consistency.require_whole("state_dict")
        self.runner.refuse_bad_flags(wait=True)
        read_clock(self.runner)
        unmoved = self.watch("state_dict")
        header = resume.header(
            self.plan(), self.runner.clip_grad_norm
        )  # first, as it names a parameter that was put into the groups
        found = {**without_compiler(super().state_dict)(), resume.KEY: header}
        unmoved()
        return found

    def watch(self, action: str) -> Callable[[], None]:
        """Return a function to call when the state has been read for `action`.

        Raises:
            MovedStateError: from the function, if a parameter was updated meanwhile.
            InconsistentStateError: from the function, if a step has begun and not ended.
        """
        read_clock(self.runner)
        return loading.watch_state(self.runner, action)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue exactly where the saved run stopped. Strict: nothing is cast, guessed or left out.

        Values are copied into this optimizer's tensors; the dict stays untouched. A parameter that is frozen here keeps
        the state that was saved of it. One of which none was saved begins anew, with a warning, if the dict is not of
        this library's `state_dict`, which has state for all that trains; else the dict is refused if it trains here.

        Where parameters are DTensors all ranks that share them must call this; it fails on all of them or on none.

        Raises:
            ValueError: if groups, names, shapes, dtypes or stores differ, naming the parameter. Nothing is
                changed then.
            DisagreementError: if it fails on another rank, or ranks load different steps, hyper-parameters or, as far
                as they have whole tensors, numbers. Nothing is changed then, on any rank.
            RuntimeError: inside a backward pass.
            MovedStateError: if another thread steps meanwhile; the optimizer is inconsistent then.
        """

        def prepare() -> tuple[Mapping[str, Any], Copy]:
            saved = dict(state_dict)
            for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
                saved = pre_hook(self, saved) or saved
            return saved, copy_part

        loading.load_prepared(self.runner, prepare)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def load_prepared(
        self, prepare: Callable[[], tuple[Mapping[str, Any], Copy]], content: Callable[[], Mapping[str, str]] = dict
    ) -> None:
        """Load state as `load_state_dict` does between its hooks, on all processes that share parameters or on none.

        Args:
            prepare: returns what was saved, and a function that copies a saved tensor into one of this optimizer's.
                Saved tensors need only shape and dtype, so that a file can be read into place.
            content: returns what else must be the same on the processes, in words; called after `prepare` where there
                are several.

        Raises:
            What `prepare` raises, and as `load_state_dict`.
            InconsistentStateError: if another process failed after this one had begun to copy.
        """
        loading.load_prepared(self.runner, prepare, content)

    def __getstate__(self) -> dict[str, Any]:
        self.runner.consistency.require_trained_weights("copy")
        runner, parameters = self.runner, self.runner.parameters
        clip = runner.clip_grad_norm if runner.hooks is not None else runner.clip_of_original
        own: dict[str, Any] = {"_route": parameters.route, "_weights": parameters.weights, "_names": parameters.names}
        own["_backend"], own["_inconsistent"] = parameters.backend, runner.consistency.reason_of_copy
        own["_compiles"] = parameters.compiler is not None
        return {**super().__getstate__(), **own, "_clip_of_original": clip}

    def __setstate__(self, state: dict[str, Any]) -> None:
        param_groups.refuse_inference_mode("copying an optimizer")
        state = dict(state)
        names = state.pop("_names", naming.CanonicalNames())
        parameters = TrackedParameters(state.pop("_route"), state.pop("_weights"), names)
        parameters.use_backend(state.pop("_backend", "auto"))
        parameters.compile_with(ChainCompiler() if state.pop("_compiles", False) else None)
        self.runner = StepRunner(self, parameters, state.pop("_inconsistent"))
        self.runner.clip_of_original = state.pop("_clip_of_original", None)
        self._built = True
        super().__setstate__(state)
        for index in range(len(self.param_groups)):
            parameters.adopt(index, self.param_groups, self.state)


def _averages(chain: Chain) -> bool:
    """Return whether a chain averages weights."""
    return any(isinstance(transform, schedule_free) for transform in chain.transforms)
