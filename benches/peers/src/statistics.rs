//! What the rounds come to.

#[path = "../../support/spread.rs"]
mod spread;

pub(crate) use spread::Spread;

impl Spread {
    /// Of what the figures are to those of the same rounds.
    pub(crate) fn of_ratios(figures: &[f64], to: &[f64]) -> Self {
        Self::of(figures.iter().zip(to).map(|(figure, to)| figure / to))
    }

    /// The median, and in brackets the least and the greatest.
    pub(crate) fn text(self) -> String {
        format!("{} ({} to {})", number(self.median), number(self.min), number(self.max))
    }
}

/// To two digits that count at least, with a comma at thousands.
pub(crate) fn number(figure: f64) -> String {
    let size = figure.abs();
    if figure == 0.0 {
        "0".to_owned()
    } else if size < 0.1 {
        let decimals = (1.0 - size.log10()).ceil() as usize;
        format!("{figure:.decimals$}")
    } else if size < 10.0 {
        format!("{figure:.2}")
    } else if size < 99.95 {
        format!("{figure:.1}")
    } else {
        let digits = format!("{size:.0}");
        let mut text = String::new();
        for (index, digit) in digits.chars().enumerate() {
            if index > 0 && (digits.len() - index).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        if figure < 0.0 { format!("-{text}") } else { text }
    }
}

/// The order in which `count` peers take turns in `round`: each comes first, and each after another, in turn.
pub(crate) fn order(round: usize, count: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |turn| {
        let turn = if (round / count.max(1)).is_multiple_of(2) { turn } else { count - 1 - turn };
        (turn + round) % count
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_of_the_middle_and_the_ends_whatever_the_order() {
        let spread = Spread::of([5.0, 1.0, 9.0, 2.0, 3.0]);
        assert_eq!(spread, Spread { median: 3.0, min: 1.0, max: 9.0 });
    }

    #[test]
    fn ratios_are_taken_within_a_round_not_between_medians() {
        // The second round was twice as slow for both: a ratio of medians would say otherwise.
        let spread = Spread::of_ratios(&[2.0, 4.0, 30.0], &[1.0, 2.0, 10.0]);
        assert_eq!(spread, Spread { median: 2.0, min: 2.0, max: 3.0 });
    }

    #[test]
    fn every_peer_comes_first_in_its_turn_and_once_a_round() {
        let firsts: Vec<_> = (0..3).map(|round| order(round, 3).next().unwrap()).collect();
        assert_eq!(firsts, [0, 1, 2]);
        for round in 0..12 {
            let mut turns: Vec<_> = order(round, 3).collect();
            turns.sort_unstable();
            assert_eq!(turns, [0, 1, 2]);
        }
    }

    #[test]
    fn numbers_have_two_digits_that_count_at_least() {
        let texts = [0.0, 0.000_123, 0.0123, 0.123, 1.234, 12.34, 99.97, 1234.5, 1_234_567.0].map(number);
        assert_eq!(texts, ["0", "0.00012", "0.012", "0.12", "1.23", "12.3", "100", "1,234", "1,234,567"]);
    }
}
