/**
 * Whether threads pay at the moment. Where other programs hold the processors, a worker that took a call may have to wait for its turn while
 * everybody waits for it, and several threads are slower than one. Results do not depend on the number of threads, so they can
 * rest for a while and be tried again.
 *
 * @module
 */

/** Milliseconds lost, or won, that decide: more than one unlucky round on a free machine. */
const LIMIT = 2;
/** How much of what earlier rounds won or lost still counts at each round. */
const MEMORY = 0.95;
/** Milliseconds of the first rest and of the longest; each is twice the one before, until threads have paid again. */
const FIRST_REST = 50, LONGEST_REST = 2000;

/** Keeps account of what rounds win and lose. Times are milliseconds of `performance.now()`. */
export class Payoff {
  #balance = 0;
  #rest = FIRST_REST;
  #restsUntil = -Infinity;

  /** Whether threads should rest now. */
  isResting(now: number): boolean {
    return now < this.#restsUntil;
  }

  /**
   * Notes a round.
   *
   * @param alone How long one undisturbed thread would have taken.
   * @param together How long the threads took, disturbed or not.
   * @param now When the round ended.
   */
  note(alone: number, together: number, now: number): void {
    this.#balance = MEMORY * this.#balance + alone - together;
    if (this.#balance > LIMIT) this.#rest = FIRST_REST;
    if (this.#balance >= -LIMIT) return;
    this.#restsUntil = now + this.#rest;
    this.#rest = Math.min(2 * this.#rest, LONGEST_REST);
    this.#balance = 0;
  }
}
