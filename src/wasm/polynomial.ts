/**
 * Polynomial approximations, computed when code is emitted: no table of magic numbers to trust.
 *
 * @module
 */

/**
 * Coefficients c[0..degree] of the polynomial that meets `value` at the Chebyshev points of [low, high]; its error is within
 * a small factor of the best polynomial's. Meant for degrees up to about 10 (monomials lose digits beyond).
 */
export function fitPolynomial(value: (x: number) => number, low: number, high: number, degree: number): number[] {
  const count = degree + 1;
  const points = Array.from(
    { length: count },
    (_, i) => (low + high) / 2 + (high - low) / 2 * Math.cos(Math.PI * (i + 0.5) / count),
  );
  const differences = points.map(value);
  for (let order = 1; order < count; order++) {
    for (let i = count - 1; i >= order; i--) {
      differences[i] = (differences[i] - differences[i - 1]) / (points[i] - points[i - order]);
    }
  }
  // Newton's form to monomials, from the innermost factor outwards.
  const coefficients = new Array<number>(count).fill(0);
  for (let i = count - 1; i >= 0; i--) {
    for (let j = count - 1; j > 0; j--) coefficients[j] = coefficients[j - 1] - points[i] * coefficients[j];
    coefficients[0] = differences[i] - points[i] * coefficients[0];
  }
  return coefficients;
}
