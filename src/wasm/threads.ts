/**
 * A team of threads that share out calls of one WebAssembly module on one shared memory.
 *
 * The main thread publishes a list of calls; it and the workers take calls from it until none is left, and the main thread waits for
 * those that are still running. Who takes which call depends on chance, so a call must not depend on another one of the same list, and
 * results must not depend on who computed them: each call writes its own part of the output. A worker that the system has not
 * woken yet costs nothing, because nobody waits for workers, only for calls that were taken.
 *
 * All is governed by one number, the **ticket**: a round's number and how many of its calls are not taken yet. To take a call
 * is to lower the ticket by one in an atomic exchange, so a worker that was asleep for whole rounds can only take a call of the
 * current one. Calls and their arguments are written before the ticket and read after it. Cost of a round beside its calls:
 * a few µs while the workers are awake, 20 to 40 µs where the system has to wake them.
 *
 * @module
 */
import { Worker } from "node:worker_threads";
import { Payoff } from "./payoff.ts";

/** Places in the control block of 32-bit integers. */
const TICKET = 0, LEFT = 1, SLEEPERS = 2, MAIN_WAITS = 3, FAILED = 4, CONTROLS = 16;
/** Bits of the ticket that count calls; a round has at most {@linkcode MOST_CALLS}. */
const COUNT_BITS = 8;
/** Calls that one round can hold. */
export const MOST_CALLS = 2 ** COUNT_BITS - 1;
const ROUNDS = 2 ** (31 - COUNT_BITS);
/** A ticket that sends the workers home. */
const QUIT = -1;
/** Numbers per call: its function, how many arguments, its result, then the arguments. */
const CALL = 32;
/** Scratch addresses that a call can have after its arguments. */
const MOST_SCRATCH = 6;
/** Numbers before the calls: address and size of the first thread's scratch, how many parts it has and where they begin. */
const HEAD = 3 + MOST_SCRATCH;
/** Bytes that hold what a worker says when it fails. */
const MESSAGE = 256;
/**
 * Milliseconds for which a worker looks for the next round before it sleeps: longer than what usually lies between two kernels
 * (tried with decoding: 0.05 made two threads no faster than one, 0.6 was no better than 0.2).
 */
const PATIENCE = 0.2;
/** Milliseconds for which the main thread looks for the others' end before it sleeps: it may hold the processor that they need. */
const MAIN_PATIENCE = 0.05;
/** Milliseconds of one sleep of the main thread, and how many pass until a worker counts as lost. */
const NAP = 1000, NAPS = 60;
/** Milliseconds that a worker has to start. */
const START_LIMIT = 20_000;

/** What a worker receives. */
interface Outfit {
  readonly module: WebAssembly.Module;
  readonly memory: WebAssembly.Memory;
  readonly names: readonly string[];
  readonly control: Int32Array<SharedArrayBuffer>;
  readonly calls: Float64Array<SharedArrayBuffer>;
  readonly message: Uint8Array<SharedArrayBuffer>;
  /** 1 for the first worker; the main thread is 0. */
  readonly thread: number;
}

type Functions = Readonly<Record<string, (...values: number[]) => number | undefined>>;

/**
 * What a worker does. Its text runs as a program of its own (a `data:` address, which needs no permission and no file), so it may
 * use nothing from this file but what it is given; `places` are the constants above.
 */
function serve(outfit: Outfit, places: Readonly<Record<string, number>>, ready: () => void): void {
  const { module, memory, names, control, calls, message, thread } = outfit;
  const { TICKET, LEFT, SLEEPERS, MAIN_WAITS, FAILED, COUNT_BITS, CALL, HEAD, PATIENCE } = places;
  const functions = new WebAssembly.Instance(module, { env: { memory, log: Math.log } }).exports as Functions;
  const pause = (Atomics as { pause?: () => void }).pause ?? (() => {});
  const perform = (call: number): void => {
    const at = HEAD + call * CALL, count = calls[at + 1], own = calls[0] + thread * calls[1];
    const values = Array.from({ length: count }, (_, i) => calls[at + 3 + i]);
    for (let i = 0; i < calls[2]; i++) values.push(own + calls[3 + i]);
    calls[at + 2] = functions[names[calls[at]]](...values) ?? 0;
  };
  const sleep = (ticket: number): void => {
    const end = performance.now() + PATIENCE;
    do {
      for (let i = 0; i < 32; i++) {
        if (Atomics.load(control, TICKET) !== ticket) return;
        pause();
      }
    } while (performance.now() < end);
    Atomics.add(control, SLEEPERS, 1);
    Atomics.wait(control, TICKET, ticket);
    Atomics.sub(control, SLEEPERS, 1);
  };
  ready();
  for (;;) {
    const ticket = Atomics.load(control, TICKET);
    if (ticket < 0) return;
    const open = ticket & (2 ** COUNT_BITS - 1);
    if (open === 0) {
      sleep(ticket);
      continue;
    }
    if (Atomics.compareExchange(control, TICKET, ticket, ticket - 1) !== ticket) continue;
    try {
      perform(open - 1);
    } catch (error) {
      const text = new TextEncoder().encode(error instanceof Error ? error.message : String(error));
      message.fill(0);
      message.set(text.subarray(0, message.length));
      Atomics.store(control, FAILED, thread);
    }
    if (Atomics.sub(control, LEFT, 1) === 1 && Atomics.load(control, MAIN_WAITS) === 1) Atomics.notify(control, LEFT);
  }
}

const places = { TICKET, LEFT, SLEEPERS, MAIN_WAITS, FAILED, COUNT_BITS, CALL, HEAD, PATIENCE };
const program = `
import { parentPort, workerData } from "node:worker_threads";
(${serve})(workerData, ${JSON.stringify(places)}, () => parentPort.postMessage("ready"));
`;

/** What a {@linkcode ThreadTeam} works on. */
export interface TeamOptions {
  /** Imports `env.memory`, shared, and `env.log`. */
  readonly module: WebAssembly.Module;
  readonly memory: WebAssembly.Memory;
  /** The module's functions on the main thread. */
  readonly functions: Functions;
  /** Threads in all, the main thread counted: 2 or more. */
  readonly threads: number;
  /** Sleeps of one second after which a worker that does not finish counts as lost. @default {60} */
  readonly naps?: number;
}

/** Scratch memory of a team: each thread has as much of its own, in parts that begin at `offsets`. */
export interface TeamScratch {
  /** Of the main thread's. */
  readonly address: number;
  /** From one thread's scratch to the next one's, in bytes. */
  readonly stride: number;
  readonly offsets: readonly number[];
}

/** The threads; see the head of this file. Made by {@linkcode ThreadTeam.start}, ended by {@linkcode ThreadTeam.stop}. */
export class ThreadTeam {
  /** Threads in all, the main thread counted. */
  readonly threads: number;
  #functions: Functions;
  #names: readonly string[];
  #naps: number;
  #control = new Int32Array(new SharedArrayBuffer(4 * CONTROLS));
  #calls = new Float64Array(new SharedArrayBuffer(8 * (HEAD + CALL * MOST_CALLS)));
  #message = new Uint8Array(new SharedArrayBuffer(MESSAGE));
  #workers: Worker[] = [];
  #rounds = 0;
  #payoff = new Payoff();
  #lost?: string;
  #stopped = false;

  private constructor({ functions, threads, naps = NAPS }: TeamOptions) {
    this.threads = threads;
    this.#functions = functions;
    this.#names = Object.keys(functions);
    this.#naps = naps;
  }

  /**
   * Starts the workers and waits until they are ready. They do not keep the process alive.
   *
   * @throws {Error} A worker was refused or did not start; none is left running.
   */
  static async start(options: TeamOptions): Promise<ThreadTeam> {
    const team = new ThreadTeam(options), starts: Promise<void>[] = [];
    try {
      for (let thread = 1; thread < options.threads; thread++) starts.push(team.#add(options, thread));
      await Promise.all(starts);
      return team;
    } catch (error) {
      await team.stop();
      await Promise.allSettled(starts);
      throw error;
    }
  }

  async #add({ module, memory }: TeamOptions, thread: number): Promise<void> {
    const [control, calls, message] = [this.#control, this.#calls, this.#message];
    const workerData: Outfit = { module, memory, names: this.#names, control, calls, message, thread };
    const worker = new Worker(new URL(`data:text/javascript,${encodeURIComponent(program)}`), { workerData });
    this.#workers.push(worker);
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const limit = setTimeout(() => reject(new Error(`thread ${thread} did not start in time`)), START_LIMIT);
    const lose = (why: string): void => {
      if (!this.#stopped) this.#lost ??= `thread ${thread + 1} ended: ${why}`;
      reject(new Error(why));
    };
    worker.on("message", () => resolve());
    worker.on("error", (error: unknown) => lose(error instanceof Error ? error.message : String(error)));
    worker.on("exit", () => lose("it was terminated"));
    try {
      await promise;
    } finally {
      clearTimeout(limit);
      worker.unref();
    }
  }

  /**
   * Calls a function of the module once for each list of arguments, in any order and on any thread, and waits for all.
   *
   * @param scratch Scratch addresses, appended to the arguments of every call.
   * @returns The results, 0 for a function without one.
   * @throws {RangeError} More than {@linkcode MOST_CALLS} calls, or too many arguments.
   * @throws {Error} A call failed, or a worker was lost; the output is undefined then.
   */
  run(name: string, lists: readonly (readonly number[])[], scratch: TeamScratch): number[] {
    if (this.#lost !== undefined) throw this.#failure(this.#lost);
    const start = performance.now();
    this.#publish(name, lists, scratch);
    const results = new Array<number>(lists.length).fill(0), own = scratch.offsets.map((x) => scratch.address + x);
    const taken = new Set<number>();
    let failure: unknown, begun = performance.now(), shortest = Infinity;
    for (let call = this.#take(); call >= 0; call = this.#take()) {
      taken.add(call);
      try {
        // After a failure the rest is only counted off.
        if (failure === undefined) results[call] = this.#functions[name](...lists[call], ...own) ?? 0;
      } catch (error) {
        failure = error;
      }
      Atomics.sub(this.#control, LEFT, 1);
      const now = performance.now();
      // The shortest, because others may hold a time in which the system ran something else, such as a worker.
      shortest = Math.min(shortest, now - begun);
      begun = now;
    }
    this.#join();
    const end = performance.now();
    if (taken.size > 0) this.#payoff.note(lists.length * shortest, end - start, end);
    if (failure !== undefined) throw failure;
    this.#checkFailed(name);
    for (let call = 0; call < lists.length; call++) {
      if (!taken.has(call)) results[call] = this.#calls[HEAD + call * CALL + 2];
    }
    return results;
  }

  #publish(name: string, lists: readonly (readonly number[])[], { address, stride, offsets }: TeamScratch): void {
    const calls = this.#calls, control = this.#control, id = this.#names.indexOf(name);
    if (id < 0) throw new RangeError(`the module has no function ${name}`);
    if (lists.length > MOST_CALLS) throw new RangeError(`${lists.length} calls, a round holds ${MOST_CALLS}`);
    if (offsets.length > MOST_SCRATCH || lists.some(({ length }) => length > CALL - 3)) {
      throw new RangeError(`${name}: a call holds ${CALL - 3} arguments and ${MOST_SCRATCH} parts of scratch`);
    }
    calls.set([address, stride, offsets.length, ...offsets]);
    for (const [i, list] of lists.entries()) {
      const at = HEAD + i * CALL;
      calls[at] = id;
      calls[at + 1] = list.length;
      for (let j = 0; j < list.length; j++) calls[at + 3 + j] = list[j];
    }
    this.#rounds++;
    Atomics.store(control, MAIN_WAITS, 0);
    Atomics.store(control, FAILED, 0);
    Atomics.store(control, LEFT, lists.length);
    Atomics.store(control, TICKET, (this.#rounds % ROUNDS) * 2 ** COUNT_BITS + lists.length);
    if (Atomics.load(control, SLEEPERS) > 0) Atomics.notify(control, TICKET, lists.length - 1);
  }

  /** Takes a call of the round; −1 where none is left. */
  #take(): number {
    for (;;) {
      const ticket = Atomics.load(this.#control, TICKET), open = ticket & MOST_CALLS;
      if (ticket < 0 || open === 0) return -1;
      if (Atomics.compareExchange(this.#control, TICKET, ticket, ticket - 1) === ticket) return open - 1;
    }
  }

  /** Waits until no call is running. */
  #join(): void {
    const control = this.#control, end = performance.now() + MAIN_PATIENCE;
    do {
      for (let i = 0; i < 32; i++) if (Atomics.load(control, LEFT) === 0) return;
    } while (performance.now() < end);
    Atomics.store(control, MAIN_WAITS, 1);
    for (let naps = 0;;) {
      const left = Atomics.load(control, LEFT);
      if (left === 0) return;
      if (Atomics.wait(control, LEFT, left, NAP) === "timed-out" && ++naps >= this.#naps) {
        this.#lost = `a thread did not finish its call within ${naps * NAP / 1000} s`;
        throw this.#failure(this.#lost);
      }
    }
  }

  #checkFailed(name: string): void {
    const thread = Atomics.load(this.#control, FAILED);
    if (thread === 0) return;
    const text = new TextDecoder().decode(this.#message.slice()).replace(/\0.*$/s, "");
    throw this.#failure(`thread ${thread + 1} failed in ${name}: ${text}`);
  }

  #failure(what: string): Error {
    return new Error(`${what} (of ${this.threads} threads); --threads 1 computes without them`);
  }

  /** How often work was shared out. */
  get rounds(): number {
    return this.#rounds;
  }

  /** Whether all workers sleep, so that a round has to wake them. */
  get isAsleep(): boolean {
    return Atomics.load(this.#control, SLEEPERS) >= this.threads - 1;
  }

  /** Whether sharing work out has cost more than it gave, so that one thread should go on alone for a while. */
  get isResting(): boolean {
    return this.#payoff.isResting(performance.now());
  }

  /** Whether a thread was lost, or all were stopped: then {@linkcode ThreadTeam.run} throws. */
  get isLost(): boolean {
    return this.#lost !== undefined;
  }

  /** Ends the workers and waits until they are gone. Idempotent. */
  async stop(): Promise<void> {
    this.#stopped = true;
    this.#lost ??= "the threads were stopped";
    Atomics.store(this.#control, TICKET, QUIT);
    Atomics.notify(this.#control, TICKET);
    await Promise.all(this.#workers.splice(0).map((worker) => worker.terminate()));
  }
}
