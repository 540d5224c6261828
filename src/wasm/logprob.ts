/**
 * Log-probability of one token per row, with the entropy of the row's distribution.
 *
 * With z = (logits + suppress) / temperature, p = softmax(z), t = target:
 *
 * - `MgpoLogSoftmaxGather`: logits [N, V], target int32 [N], optional suppress [V] (0, or −1e30 for tokens that cannot be drawn);
 *   attribute `temperature` > 0 → logprob [N] = z_t − lse, entropy [N] = −Σ p ln p in nats, lse [N] = ln Σ e^z.
 *   Target −1 gives logprob 0.
 * - `MgpoLogSoftmaxGatherGrad`: logits, target, suppress, lse, entropy, dlogprob [N], dentropy [N] → dlogits [N, V]:
 *   dlogits_j = (dlogprob · (δ_jt − p_j) − dentropy · p_j · (ln p_j + entropy)) / temperature (no δ and no p for target −1).
 *
 * Cost: one exponential per logit. Sums over the vocabulary are taken in f64.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { F32, type FunctionBuilder, I32, invoke, load, madd, V128 } from "./asm.ts";
import { type Access, addToDoubles, doubleTotal, eachVector, exp, maxLane } from "./lanes.ts";
import type { ModuleBuilder } from "./module.ts";
import type { Parts } from "./parts.ts";
import type { KernelCall, KernelFile } from "./runtime.ts";

/** Both kernels. */
export const logprob: KernelFile = {
  emit,
  kernels: [{ name: "MgpoLogSoftmaxGather", run: forward }, { name: "MgpoLogSoftmaxGatherGrad", run: backward }],
};

/** Stands for −∞ where a product with p = 0 must be 0, not NaN. */
const LOWEST = -1e30;

function emit(m: ModuleBuilder, parts: Parts): void {
  emitForward(m, parts);
  emitBackward(m, parts);
}

/** z of four tokens; lanes beyond the vocabulary get probability 0. */
function scores(f: FunctionBuilder, at: Access, logits: I32, suppress: I32, inverse: V128): V128 {
  return f.v128(at.load(logits, LOWEST).add(at.load(suppress)).mul(inverse).pmax(LOWEST));
}

/** `log_softmax_gather(rows, vocabulary, inverse, logits, target, suppress, logprob, entropy, lse)` → −1, or a row with a bad target. */
function emitForward(m: ModuleBuilder, parts: Parts): void {
  const parameters = ["i32", "i32", "f32", "i32", "i32", "i32", "i32", "i32", "i32"] as const;
  m.function(
    "log_softmax_gather",
    parameters,
    (f, rows, vocabulary, inverse, logits, target, suppress, out, entropy, lse) => {
      const scale = f.v128(inverse.splat());
      const most = f.v128();
      const totals: [ReturnType<typeof f.v128>, ReturnType<typeof f.v128>] = [f.v128(), f.v128()];
      const moments: [ReturnType<typeof f.v128>, ReturnType<typeof f.v128>] = [f.v128(), f.v128()];
      f.for(0, rows, 1, (i) => {
        const token = f.i32(load.i32(target.add(i.shl(2))));
        f.if(token.lt(-1).or(token.ge(vocabulary)), () => f.return(i));
        most.set(V128.of(LOWEST));
        eachVector(f, parts, vocabulary, (at) => most.set(most.pmax(scores(f, at, logits, suppress, scale))));
        const top = f.v128(maxLane(f, most).splat());
        for (const sum of [...totals, ...moments]) sum.set(V128.of(0));
        eachVector(f, parts, vocabulary, (at) => {
          const z = f.v128(scores(f, at, logits, suppress, scale).sub(top));
          const e = exp(f, z);
          addToDoubles(f, totals, e);
          addToDoubles(f, moments, e.mul(z));
        });
        const total = f.f64(doubleTotal(f, totals));
        const log = f.f64(invoke(parts.log, total));
        f.storeF32(entropy, log.sub(doubleTotal(f, moments).div(total)).toF32());
        const sum = f.f32(log.add(top.lane(0).toF64()).toF32());
        f.storeF32(lse, sum);
        f.storeF32(out, 0);
        f.if(token.ge(0), () => {
          const logit = load.f32(logits.add(token.shl(2))).add(load.f32(suppress.add(token.shl(2))));
          f.storeF32(out, logit.mul(inverse).toF64().sub(top.lane(0).toF64()).sub(log).toF32());
        });
        logits.set(logits.add(vocabulary.shl(2)));
        for (const pointer of [out, entropy, lse]) pointer.set(pointer.add(4));
      });
      f.return(I32.of(-1));
    },
    { result: "i32", exported: true },
  );
}

/** `log_softmax_gather_grad(rows, vocabulary, inverse, logits, target, suppress, lse, entropy, dlogprob, dentropy, dlogits)` */
function emitBackward(m: ModuleBuilder, parts: Parts): void {
  const parameters = ["i32", "i32", "f32", "i32", "i32", "i32", "i32", "i32", "i32", "i32", "i32"] as const;
  m.function(
    "log_softmax_gather_grad",
    parameters,
    (f, rows, vocabulary, inverse, logits, target, suppress, lse, entropy, dlogprob, dentropy, dlogits) => {
      const scale = f.v128(inverse.splat());
      const slope = f.f32();
      f.for(0, rows, 1, () => {
        const token = f.i32(load.i32(target));
        slope.set(F32.of(0));
        f.if(token.ge(0), () => slope.set(load.f32(dlogprob).mul(inverse)));
        const spread = f.v128(load.f32(dentropy).mul(inverse).splat());
        const [shift, h, pull] = [load.splat(lse), load.splat(entropy), slope.splat()].map((value) => f.v128(value));
        eachVector(f, parts, vocabulary, (at) => {
          const log = f.v128(scores(f, at, logits, suppress, scale).sub(shift));
          at.store(dlogits, exp(f, log).mul(madd(spread, log.add(h), pull)).neg());
        });
        f.if(token.ge(0), () => {
          const at = f.i32(dlogits.add(token.shl(2)));
          f.storeF32(at, load.f32(at).add(slope));
        });
        for (const pointer of [logits, dlogits]) pointer.set(pointer.add(vocabulary.shl(2)));
        for (const pointer of [target, lse, entropy, dlogprob, dentropy]) pointer.set(pointer.add(4));
      });
    },
    { exported: true },
  );
}

interface Given {
  readonly rows: number;
  readonly vocabulary: number;
  readonly inverse: number;
  readonly logits: tf.TensorInfo;
  readonly target: tf.TensorInfo;
  readonly suppress: tf.TensorInfo | undefined;
}

function given(call: KernelCall): Given {
  const logits = call.input("logits", [null, null]);
  const [rows, vocabulary] = logits.shape;
  const temperature = call.number("temperature");
  if (temperature <= 0) throw call.error(`attribute temperature must be above 0, is ${temperature}`);
  const target = call.input("target", [rows], "int32");
  return {
    rows,
    vocabulary,
    inverse: 1 / temperature,
    logits,
    target,
    suppress: call.optional("suppress", [vocabulary]),
  };
}

/** The address of `suppress`, or of as many zeros. */
function suppressed(call: KernelCall, { suppress, vocabulary }: Given): number {
  if (suppress !== undefined) return call.address(suppress);
  const zeros = call.scratch(4 * vocabulary);
  call.functions.zero(zeros, 4 * vocabulary);
  return zeros;
}

/** Rough nanoseconds per logit. */
const COST = { forward: 2, backward: 1.2 } as const;

function forward(call: KernelCall): tf.TensorInfo[] {
  const inputs = given(call);
  const { rows, vocabulary, inverse, logits, target } = inputs;
  const outputs = [0, 1, 2].map(() => call.output([rows]));
  const suppress = suppressed(call, inputs), cost = COST.forward * rows * vocabulary;
  const [logitsAt, targetAt] = [call.address(logits), call.address(target)];
  const outputsAt = outputs.map((tensor) => call.address(tensor)), ranges = call.ranges(rows, cost);
  const calls = ranges.map(([from, to]) => [
    ...[to - from, vocabulary, inverse, logitsAt + 4 * from * vocabulary, targetAt + 4 * from, suppress],
    ...outputsAt.map((address) => address + 4 * from),
  ]);
  const found = call.run("log_softmax_gather", calls, cost).map((at, i) => at < 0 ? at : at + ranges[i][0]);
  const bad = found.find((at) => at >= 0) ?? -1;
  if (bad >= 0) {
    throw call.error(`target[${bad}] is ${call.integers(target)[bad]}, must be −1 or a token below ${vocabulary}`);
  }
  return outputs;
}

function backward(call: KernelCall): tf.TensorInfo {
  const inputs = given(call);
  const { rows, vocabulary, inverse, logits, target } = inputs;
  const vectors = ["lse", "entropy", "dlogprob", "dentropy"].map((name) => call.input(name, [rows]));
  const dlogits = call.output([rows, vocabulary]);
  const suppress = suppressed(call, inputs), cost = COST.backward * rows * vocabulary;
  const [logitsAt, targetAt, dlogitsAt] = [logits, target, dlogits].map((tensor) => call.address(tensor));
  const vectorsAt = vectors.map((tensor) => call.address(tensor));
  const calls = call.ranges(rows, cost).map(([from, to]) => {
    const skip = 4 * from * vocabulary;
    return [
      ...[to - from, vocabulary, inverse, logitsAt + skip, targetAt + 4 * from, suppress],
      ...[...vectorsAt.map((address) => address + 4 * from), dlogitsAt + skip],
    ];
  });
  call.run("log_softmax_gather_grad", calls, cost);
  return dlogits;
}
