/**
 * Which tfjs backend a run computes on, and why: a real GPU through WebGPU, otherwise WebAssembly. A software adapter (Mesa's
 * llvmpipe and the like) counts as no GPU, because WebAssembly multiplies matrices about five times faster on the same cores.
 *
 * @module
 */
import { tf } from "../deps.ts";
import { InputError } from "../run/errors.ts";
import { guardAllocation } from "../wasm/memory.ts";
import { watchDevice } from "./device_errors.ts";
import { installWebgpuKernels } from "./kernels/register.ts";
import { DeviceMemoryUse } from "./memory.ts";
import { PassPlans } from "./pass_plans.ts";
import { DispatchReplay } from "./replay.ts";
import { installWasmKernels, useWasmThreads } from "../wasm/register.ts";
import { startShared } from "../wasm/shared_memory.ts";

/** The backends that the project runs on. */
export type BackendName = "webgpu" | "wasm";

/** What a WebGPU adapter says of itself. */
export interface AdapterInfo {
  /** Maker of the chip, by name or number; empty where the driver does not say. */
  vendor: string;
  /** The chip among those of its maker, by name or number; empty where the driver does not say. */
  device: string;
  /** The chip in words, e.g. `NVIDIA H100`; empty where the driver does not say. */
  description: string;
  /** Whether it is a software adapter. */
  isFallback: boolean;
}

/** A decision between the backends. */
export interface BackendChoice {
  /** What computes from here on. */
  backend: BackendName;
  /** Why, in one line without a full stop. */
  reason: string;
  /** The adapter that was found, used or not. */
  adapter?: AdapterInfo;
  /** How many threads compute; on `wasm` only. */
  threads?: number;
  /** What a user may want to change, in one line: where `auto` could not take a GPU, or threads could not be had. */
  notice?: string;
}

/** Always the packed matmul program: the split-K program that tfjs may pick adds partial sums in an order that varies. */
const PACKED_MATMUL = 3;

/**
 * Decides between the backends. Pure: {@linkcode chooseBackend} looks for the adapter and switches.
 *
 * @param name `auto`, `webgpu` or `wasm`.
 * @param adapter The adapter that was found, if any.
 * @throws {InputError} if the name is unknown, or `webgpu` is asked for and there is no adapter.
 */
export function decideBackend(name: string, adapter: AdapterInfo | undefined): BackendChoice {
  const label = adapter && adapterLabel(adapter);
  switch (name) {
    case "wasm":
      return { backend: "wasm", reason: "asked for" };
    case "webgpu":
      if (!adapter) {
        throw new InputError(
          "--backend webgpu: no WebGPU adapter was found; install a GPU driver with Vulkan, Metal or Direct3D 12, or use --backend wasm",
        );
      }
      return { backend: "webgpu", reason: `asked for; adapter ${label}`, adapter };
    case "auto":
      if (!adapter) {
        return {
          backend: "wasm",
          reason: "no WebGPU adapter was found",
          notice: "no GPU: computing on the processor; a GPU needs a driver with Vulkan, Metal or Direct3D 12",
        };
      }
      if (adapter.isFallback) {
        return {
          backend: "wasm",
          reason: `the only WebGPU adapter is a software one: ${label}`,
          adapter,
          notice: "no GPU: computing on the processor; --backend webgpu would use the slower software adapter",
        };
      }
      return { backend: "webgpu", reason: `GPU found: ${label}`, adapter };
    default:
      throw new InputError(`--backend ${name}: unknown backend; use auto, webgpu or wasm`);
  }
}

/**
 * Chooses a backend, starts it and makes it current. Call it before the first tensor.
 *
 * @param name `auto` (a real GPU if there is one, otherwise wasm), `webgpu` or `wasm`. @default {"auto"}
 * @param options.onLost Called when the GPU device is lost or reports an error that no call received.
 * @param options.threads Threads that compute, on `wasm`; results do not depend on it. 1 starts no others; where they cannot be had, a
 * notice says so and one thread computes. A later call changes the number, unless the first one asked for 1.
 * @default {as in the call before, at first all processor cores}
 * @param options.replay Whether repeated dispatches find their bind groups and uniforms again, and repeated passes of training are done
 * from recordings, on `webgpu`; results do not depend on it.
 * @default {true}
 * @throws {InputError} if the name is unknown, there is no adapter for `webgpu`, the backend cannot start, or the number of threads is no
 * whole number of at least 1.
 */
export async function chooseBackend(
  name = "auto",
  options: { onLost?: (message: string) => void; threads?: number; replay?: boolean } = {},
): Promise<BackendChoice> {
  const threads = options.threads ?? threadsBefore ?? navigator.hardwareConcurrency;
  if (!Number.isInteger(threads) || threads < 1) {
    throw new InputError(`--threads ${threads}: must be a whole number of at least 1`);
  }
  threadsBefore = options.threads ?? threadsBefore;
  const choice = decideBackend(name, name === "auto" || name === "webgpu" ? await findAdapter() : undefined);
  if (choice.backend === "webgpu") {
    tf.env().set("WEBGPU_MATMUL_PROGRAM_TYPE", PACKED_MATMUL);
  }
  await startBackend(choice, threads);
  guardAllocation(tf.backend());
  DeviceMemoryUse.of(tf.backend());
  for (const replay of [DispatchReplay.of(tf.backend()), PassPlans.of(tf.backend())]) {
    if (replay) replay.enabled = options.replay ?? true;
  }
  watchDevice(options.onLost ?? ((message) => console.error(message)));
  return choice;
}

/** The number of threads that a caller asked for last. */
let threadsBefore: number | undefined;

/** Asks WebGPU for its adapter; undefined where there is none. */
async function findAdapter(): Promise<AdapterInfo | undefined> {
  quietMesa();
  const adapter = await navigator.gpu?.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) return undefined;
  const { vendor, device, description, isFallbackAdapter } = adapter.info;
  return { vendor, device, description, isFallback: isFallbackAdapter };
}

/**
 * Mesa's software Vulkan prints an error when XDG_RUNTIME_DIR is unset, as it is in most containers, although nothing is
 * wrong. Only done where the environment may be written.
 */
function quietMesa(): void {
  if (Deno.build.os !== "linux") return;
  const permission = { name: "env", variable: "XDG_RUNTIME_DIR" } as const;
  if (Deno.permissions.querySync(permission).state !== "granted") return;
  if (!Deno.env.get("XDG_RUNTIME_DIR")) Deno.env.set("XDG_RUNTIME_DIR", "/");
}

/** Starts the backend with its kernels; the choice is completed by the threads. */
async function startBackend(choice: BackendChoice, threads: number): Promise<void> {
  const { backend } = choice, start = () => tf.setBackend(backend);
  let started = false, cause: unknown;
  try {
    started = await (backend === "wasm" && threads > 1 ? startShared(start) : start());
    await tf.ready();
  } catch (error) {
    cause = error;
  }
  if (started && tf.getBackend() === backend) {
    if (backend === "webgpu") return installWebgpuKernels();
    installWasmKernels();
    const used = await useWasmThreads(threads);
    choice.threads = used.threads;
    choice.notice = [choice.notice, used.notice].filter(Boolean).join("; ") || undefined;
    return;
  }
  const advice = backend === "wasm"
    ? "its .wasm file is read from Deno's npm cache, so run with --allow-read"
    : "the GPU refused a device; try --backend wasm";
  const why = cause instanceof Error ? ` (${cause.message.split("\n")[0]})` : "";
  throw new InputError(`--backend ${backend}: it could not be started${why}; ${advice}`);
}

/** An adapter in a few words. */
function adapterLabel({ vendor, device, description }: AdapterInfo): string {
  return description || `vendor ${vendor}, device ${device}`;
}

/** One line that names the backend, its threads and the reason. */
export function describeBackend({ backend, reason, threads }: BackendChoice): string {
  const count = threads === undefined ? "" : `, ${threads} ${threads === 1 ? "thread" : "threads"}`;
  return `backend ${backend}${count}: ${reason}`;
}
