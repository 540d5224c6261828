/**
 * A headless Chromium for tests, spoken to by its DevTools protocol: enough to load a page, press keys and look.
 *
 * @module
 */

/** Where Chromium is; undefined on machines without one. */
export async function findChromium(): Promise<string | undefined> {
  const folders = (Deno.env.get("PATH") ?? "").split(Deno.build.os === "windows" ? ";" : ":");
  const names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
  for (const path of folders.filter(Boolean).flatMap((folder) => names.map((name) => `${folder}/${name}`))) {
    if (await Deno.stat(path).then((info) => info.isFile, () => false)) return path;
  }
  return undefined;
}

const FLAGS = [
  ...[
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
  ],
  ...["--disable-component-update", "--disable-sync", "--remote-debugging-port=0", "--window-size=1280,900"],
];

type Message = Record<string, unknown>;

/** One page of one browser. */
export class ChromiumPage {
  /** What the page complained about: errors, warnings, refused requests. */
  readonly complaints: string[] = [];
  readonly #socket: WebSocket;
  readonly #process: Deno.ChildProcess;
  readonly #profile: string;
  readonly #waiting = new Map<number, PromiseWithResolvers<Message>>();
  readonly #listeners = new Map<string, () => void>();
  #session?: string;
  #calls = 0;

  private constructor(socket: WebSocket, process: Deno.ChildProcess, profile: string) {
    this.#socket = socket;
    this.#process = process;
    this.#profile = profile;
    socket.onmessage = ({ data }) => this.#hear(JSON.parse(data));
  }

  /** Starts a browser with a profile of its own. */
  static async start(path: string): Promise<ChromiumPage> {
    const profile = await Deno.makeTempDir();
    const process = new Deno.Command(path, {
      args: [...FLAGS, `--user-data-dir=${profile}`, "about:blank"],
      ...{ stdin: "null", stdout: "null", stderr: "piped" },
    }).spawn();
    const socket = new WebSocket(await addressOf(process));
    await new Promise((resolve, reject) => (socket.onopen = resolve, socket.onerror = reject));
    const page = new ChromiumPage(socket, process, profile);
    const { targetId } = await page.#call("Target.createTarget", { url: "about:blank" });
    const { sessionId } = await page.#call("Target.attachToTarget", { targetId, flatten: true });
    page.#session = sessionId as string;
    for (const domain of ["Page", "Runtime", "Log"]) await page.#call(`${domain}.enable`);
    return page;
  }

  /** Loads an address, to the end. */
  async open(address: string): Promise<void> {
    const loaded = new Promise<void>((resolve) => this.#listeners.set("Page.loadEventFired", resolve));
    await this.#call("Page.navigate", { url: address });
    await loaded;
  }

  /** The value of an expression in the page; promises are awaited. */
  async value<T = unknown>(expression: string): Promise<T> {
    const { result, exceptionDetails } = await this.#call("Runtime.evaluate", {
      ...{ expression, awaitPromise: true, returnByValue: true },
    });
    if (exceptionDetails) throw new Error(`${expression}: ${JSON.stringify(exceptionDetails)}`);
    return (result as { value: T }).value;
  }

  /** Presses a key as a person would. */
  async press(key: string): Promise<void> {
    const code =
      { Tab: 9, Enter: 13, " ": 32, End: 35, Home: 36, ArrowLeft: 37, ArrowUp: 38, ArrowRight: 39, ArrowDown: 40 }[key];
    const event = { key, code: key === " " ? "Space" : key, windowsVirtualKeyCode: code };
    await this.#call("Input.dispatchKeyEvent", { type: "keyDown", ...event, ...key === " " ? { text: " " } : {} });
    await this.#call("Input.dispatchKeyEvent", { type: "keyUp", ...event });
  }

  /** Moves the pointer. */
  async point(x: number, y: number): Promise<void> {
    await this.#call("Input.dispatchMouseEvent", { type: "mouseMoved", x, y });
  }

  /** Light or dark mode. */
  async prefer(scheme: "light" | "dark"): Promise<void> {
    await this.#call("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value: scheme }] });
  }

  /** Ends the browser and removes its profile. */
  async close(): Promise<void> {
    await this.#call("Browser.close").catch(() => {});
    this.#socket.close();
    await this.#process.status;
    await this.#process.stderr.cancel().catch(() => {});
    await Deno.remove(this.#profile, { recursive: true }).catch(() => {});
  }

  #call(method: string, params: Message = {}): Promise<Message> {
    const id = ++this.#calls, waiting = Promise.withResolvers<Message>();
    this.#waiting.set(id, waiting);
    this.#socket.send(JSON.stringify({ id, method, params, sessionId: this.#session }));
    return waiting.promise;
  }

  #hear({ id, result, error, method, params }: Message): void {
    const waiting = this.#waiting.get(id as number);
    if (error) waiting?.reject(new Error(JSON.stringify(error)));
    else waiting?.resolve(result as Message);
    if (typeof method !== "string") return;
    this.#listeners.get(method)?.();
    const text = JSON.stringify(params);
    if (method === "Runtime.exceptionThrown" || method === "Log.entryAdded") this.complaints.push(text);
    if (method === "Runtime.consoleAPICalled" && /"type":"(error|warning|assert)"/.test(text)) {
      this.complaints.push(text);
    }
  }
}

/** Chromium says where it listens on its standard error. */
async function addressOf(process: Deno.ChildProcess): Promise<string> {
  let text = "";
  const reader = process.stderr.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error(`Chromium ended: ${text}`);
    text += value;
    const address = /ws:\/\/\S+/.exec(text)?.[0];
    if (!address) continue;
    // Read on, so that it never waits for its pipe.
    (async () => {
      while (!(await reader.read()).done);
    })().catch(() => {});
    return address;
  }
}
