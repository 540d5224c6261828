/**
 * Passes of training that are done from recordings: a pass is recorded, and when another one has its signature, only its data is
 * uploaded and the commands are encoded again. Results are those of the pass itself, bit for bit.
 *
 * A signature repeats only where sizes do, so sizes are rounded up far enough that most passes of a run share a few of them
 * ({@link PassPlans.sharesSizes}); rounding does not depend on what is recorded.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { bindableBytes, isSoftware } from "./kernels/runtime.ts";
import { type RecordablePass, type RecordedBackend, Recording, Scratch } from "./recording.ts";

/** A pass with what decides about recording it. */
export interface PlannedPass extends RecordablePass {
  /**
   * Names everything that decides which commands the pass consists of, and all their constants: sizes, settings, what is differentiated.
   * The device and the owner are added.
   */
  readonly signature: string;
  /** Whether it may be recorded at all: how it goes depends on nothing but the signature, and it is not too large. */
  readonly isWorthwhile: boolean;
}

/** How passes were done so far. */
export interface PassCounts {
  /** Through the tape, without a recording. */
  plain: number;
  /** Through the tape, while they were recorded. */
  recorded: number;
  /** From a recording. */
  replayed: number;
}

/** The most recordings. */
const MOST = 16;
/** The most bytes of a pass that is recorded, and of what recordings hold alone (512 MiB). */
export const MOST_BYTES = 1 << 29;
/** The most bytes of what recordings share, as a multiple of that. */
export const SHARED = 2;
/** Recordings share buffers of at most so many times those of the largest. */
const LOOSE = 1.25;
/** The most signatures that are remembered. */
const MOST_SIGNATURES = 1 << 10;

/** What is known of a signature. */
interface Known {
  readonly owner: object;
  /** Passes so far. */
  seen: number;
  recording?: Recording;
  /** Why it is not recorded. */
  refusal?: string;
}

/** Recordings of the passes of a backend. */
export class PassPlans {
  readonly #backend: RecordedBackend;
  readonly #scratch: Scratch;
  /** The one used last stands last. */
  readonly #known = new Map<string, Known>();
  readonly #owners = new WeakMap<object, number>();
  #nextOwner = 0;
  /** Whether passes are recorded, and done from recordings. */
  enabled = true;
  /** The most recordings; the one unused for longest goes. @default {16} */
  most = MOST;
  /** The most bytes that recordings hold alone, and that a pass may take to be recorded. @default {512 MiB} */
  mostBytes = MOST_BYTES;
  /**
   * How many passes of a signature go before the one that is recorded. Recording takes little longer than the pass itself, and the
   * buffers that it takes are those of other recordings, so where signatures repeat, the first is recorded.
   *
   * @default {1 unless sizes are shared, else 0}
   */
  after: number;
  /**
   * Whether passes are rounded to sizes that many have in common. Computing in vain what is rounded up costs a GPU less than
   * recording does; a processor more.
   *
   * @default {unless the adapter computes on the processor}
   */
  sharesSizes: boolean;
  /** What happened so far. */
  readonly counts: PassCounts = { plain: 0, recorded: 0, replayed: 0 };

  static readonly #byBackend = new WeakMap<object, PassPlans>();

  /**
   * The plans of a backend; made by the first call.
   *
   * @returns undefined if the backend is not a WebGPU backend as TensorFlow.js 4.22 builds them.
   */
  static of(backend: object): PassPlans | undefined {
    const { device, bufferManager, recordAndSubmit, uploadToGPU } = backend as Partial<RecordedBackend>;
    const fits = device !== undefined && typeof recordAndSubmit === "function" && typeof uploadToGPU === "function" &&
      typeof bufferManager?.acquireBuffer === "function" && typeof bufferManager.releaseBuffer === "function";
    if (!fits) return undefined;
    let found = PassPlans.#byBackend.get(backend);
    if (!found) PassPlans.#byBackend.set(backend, found = new PassPlans(backend as RecordedBackend));
    return found;
  }

  private constructor(backend: RecordedBackend) {
    this.#backend = backend;
    this.#scratch = new Scratch(backend.device);
    this.sharesSizes = !isSoftware(backend.device);
    this.after = this.sharesSizes ? 0 : 1;
  }

  /** Bytes of device memory that recordings hold. */
  get bytes(): number {
    let sum = this.#scratch.bytes;
    for (const { recording } of this.#known.values()) sum += recording?.ownBytes ?? 0;
    return sum;
  }

  /** Recordings that are held. */
  get size(): number {
    return [...this.#known.values()].filter(({ recording }) => recording).length;
  }

  /** Why passes are not recorded, where that was found out. */
  get refusals(): string[] {
    return [...this.#known.values()].flatMap(({ refusal }) => refusal ?? []);
  }

  /**
   * Does a pass, by a recording if there is one.
   *
   * @param owner Whose pass it is; signatures of different owners differ.
   * @returns The results by name, owned by the caller.
   */
  run(owner: object, pass: PlannedPass): Map<string, tf.Tensor> {
    // Operations on a few numbers must be commands too, and round as they round in a recording.
    return withoutHost(() => this.#run(owner, pass));
  }

  #run(owner: object, pass: PlannedPass): Map<string, tf.Tensor> {
    const known = this.enabled && pass.isWorthwhile ? this.#of(owner, pass.signature) : undefined;
    if (known?.recording && !known.recording.isCurrent) {
      known.recording.dispose();
      known.recording = undefined;
    }
    if (known?.recording) {
      this.counts.replayed++;
      return known.recording.replay(pass);
    }
    if (!known || known.refusal !== undefined || known.seen++ < this.after) {
      this.counts.plain++;
      return plain(pass);
    }
    this.counts.recorded++;
    const { results, recording } = Recording.of(this.#backend, this.#scratch, pass);
    known.refusal = recording.refusal;
    if (known.refusal === undefined) known.recording = recording;
    this.#tighten(known);
    this.#bound(known);
    return results;
  }

  /** What is known of a signature, now the one used last. */
  #of(owner: object, signature: string): Known {
    let id = this.#owners.get(owner);
    if (id === undefined) this.#owners.set(owner, id = this.#nextOwner++);
    const key = `${id} ${bindableBytes(this.#backend.device)} ${signature}`;
    const known = this.#known.get(key) ?? { owner, seen: 0 };
    this.#known.delete(key);
    this.#known.set(key, known);
    if (this.#known.size > MOST_SIGNATURES) {
      const [oldest] = this.#known.keys();
      this.#known.get(oldest)!.recording?.dispose();
      this.#known.delete(oldest);
    }
    return known;
  }

  /**
   * Lets the other recordings go where the newest is the largest and could not use their buffers: recorded again, they use its own.
   */
  #tighten(newest: Known): void {
    const { recording } = newest;
    if (!recording || this.#scratch.bytes <= LOOSE * recording.sharedBytes) return;
    const others = [...this.#known.values()].filter((known) => known !== newest && known.recording);
    if (others.some((known) => known.recording!.sharedBytes > recording.sharedBytes)) return;
    for (const known of others) {
      known.recording!.dispose();
      known.recording = undefined;
    }
  }

  /** Lets recordings go that are too many, or hold too much; the newest only if it alone does. */
  #bound(newest: Known): void {
    for (const known of this.#known.values()) {
      const isWithin = this.size <= this.most && this.bytes - this.#scratch.bytes <= this.mostBytes &&
        this.#scratch.bytes <= SHARED * this.mostBytes;
      if (isWithin) return;
      if (known === newest) newest.refusal = "it takes too much memory";
      known.recording?.dispose();
      known.recording = undefined;
    }
  }

  /** Releases the recordings of an owner, or all of them. */
  forget(owner?: object): void {
    for (const [key, known] of this.#known) {
      if (owner !== undefined && known.owner !== owner) continue;
      known.recording?.dispose();
      this.#known.delete(key);
    }
  }
}

/** The pass itself. */
function plain({ stacked, compute }: RecordablePass): Map<string, tf.Tensor> {
  if (!stacked) return compute(undefined);
  const all = tf.tidy(() => {
    const parts = tf.concat2d(stacked.parts as tf.Tensor2D[], 0), spare = stacked.shape[0] - parts.shape[0];
    return spare > 0 ? tf.concat2d([parts, tf.zeros([spare, stacked.shape[1]])], 0) : parts;
  });
  try {
    return compute(all);
  } finally {
    all.dispose();
  }
}

/** Runs `f` while TensorFlow.js computes nothing on the host. */
function withoutHost<T>(f: () => T): T {
  const before = tf.env().getBool("WEBGPU_CPU_FORWARD");
  tf.env().set("WEBGPU_CPU_FORWARD", false);
  try {
    return f();
  } finally {
    tf.env().set("WEBGPU_CPU_FORWARD", before);
  }
}
