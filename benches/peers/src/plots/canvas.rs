//! Bars and lines on logarithmic scales.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::Outcome;
use crate::statistics::number;

pub(super) struct Bar {
    pub(super) label: String,
    pub(super) least: f64,
    pub(super) value: f64,
    pub(super) most: f64,
    pub(super) colour: RGBColor,
}

pub(super) struct Line {
    pub(super) label: String,
    pub(super) points: Vec<(f64, f64)>,
    pub(super) colour: RGBColor,
}

const TEXT: RGBColor = RGBColor(0x7a, 0x82, 0x8e);
const WIDTH: i32 = 900;
const SIZE: i32 = 14;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Powers of ten from below the least to above the greatest.
fn decades(figures: impl Iterator<Item = f64> + Clone) -> (i32, i32) {
    let least = figures.clone().filter(|&figure| figure > 0.0).fold(f64::INFINITY, f64::min);
    let (low, high) = (least.log10().floor() as i32, figures.fold(least, f64::max).log10().ceil() as i32);
    (low, high.max(low + 1))
}

/// A pixel for each figure.
struct Scale {
    decades: (i32, i32),
    pixels: (i32, i32),
}

impl Scale {
    fn at(&self, figure: f64) -> i32 {
        let (low, high) = self.decades;
        let part = (figure.log10() - f64::from(low)) / f64::from(high - low);
        self.pixels.0 + (part.max(0.0) * f64::from(self.pixels.1 - self.pixels.0)).round() as i32
    }

    fn ticks(&self) -> impl Iterator<Item = (i32, String)> {
        (self.decades.0..=self.decades.1).map(|power| {
            let figure = 10f64.powi(power);
            let text = match power {
                6.. => format!("10{}", superscript(power)),
                3.. => number(figure),
                _ => figure.to_string(),
            };
            (self.at(figure), text)
        })
    }
}

fn superscript(power: i32) -> String {
    const DIGITS: [char; 10] = ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'];
    power.to_string().chars().filter_map(|digit| digit.to_digit(10)).map(|digit| DIGITS[digit as usize]).collect()
}

fn write(area: &Area<'_>, text: &str, at: (i32, i32), across: HPos, colour: RGBColor, size: i32) -> Outcome<()> {
    let style = ("sans-serif", size).into_font().color(&colour).pos(Pos::new(across, VPos::Center));
    Ok(area.draw(&Text::new(text.to_owned(), at, style))?)
}

fn stroke(area: &Area<'_>, points: Vec<(i32, i32)>, style: ShapeStyle) -> Outcome<()> {
    Ok(area.draw(&PathElement::new(points, style))?)
}

/// `axis` is what the figures are of.
pub(super) fn bars(path: &Path, (title, note, axis): (&str, &str, &str), bars: Vec<Bar>) -> Outcome<()> {
    const ROW: i32 = 24;
    const TOP: i32 = 64;
    if bars.is_empty() {
        return Ok(());
    }
    let bottom = TOP + ROW * bars.len() as i32;
    let area = SVGBackend::new(path, (WIDTH as u32, bottom as u32 + 60)).into_drawing_area();
    write(&area, title, (10, 20), HPos::Left, TEXT, SIZE + 4)?;
    write(&area, note, (10, 42), HPos::Left, TEXT, SIZE - 2)?;
    let figures = bars.iter().flat_map(|bar| [bar.least, bar.value, bar.most]);
    let scale = Scale { decades: decades(figures), pixels: (330, WIDTH - 70) };
    for (x, text) in scale.ticks() {
        stroke(&area, vec![(x, TOP), (x, bottom)], TEXT.mix(0.35).stroke_width(1))?;
        write(&area, &text, (x, bottom + 16), HPos::Center, TEXT, SIZE)?;
    }
    let middle = (scale.pixels.0 + scale.pixels.1) / 2;
    write(&area, &format!("{axis}, logarithmic scale"), (middle, bottom + 40), HPos::Center, TEXT, SIZE)?;
    for (index, bar) in bars.iter().enumerate() {
        let middle = TOP + ROW * index as i32 + ROW / 2;
        let (least, value, most) = (scale.at(bar.least), scale.at(bar.value), scale.at(bar.most));
        let shape = [(scale.pixels.0, middle - 7), (value.max(scale.pixels.0 + 1), middle + 7)];
        area.draw(&Rectangle::new(shape, bar.colour.mix(0.7).filled()))?;
        stroke(&area, vec![(least, middle), (most, middle)], TEXT.stroke_width(2))?;
        write(&area, &bar.label, (scale.pixels.0 - 8, middle), HPos::Right, TEXT, SIZE)?;
        write(&area, &number(bar.value), (most.max(value) + 8, middle), HPos::Left, TEXT, SIZE)?;
    }
    area.present()?;
    Ok(())
}

/// `x` and `y` are what the axes are of.
pub(super) fn lines(path: &Path, (title, x, y): (&str, &str, &str), lines: Vec<Line>) -> Outcome<()> {
    const HEIGHT: i32 = 480;
    let points = lines.iter().flat_map(|line| &line.points);
    if points.clone().count() == 0 {
        return Ok(());
    }
    let area = SVGBackend::new(path, (WIDTH as u32, HEIGHT as u32)).into_drawing_area();
    write(&area, title, (10, 20), HPos::Left, TEXT, SIZE + 4)?;
    let across = Scale { decades: decades(points.clone().map(|point| point.0)), pixels: (80, WIDTH - 130) };
    let up = Scale { decades: decades(points.map(|point| point.1)), pixels: (HEIGHT - 60, 64) };
    let middle = (across.pixels.0 + across.pixels.1) / 2;
    write(&area, &format!("{x}, logarithmic scale"), (middle, HEIGHT - 20), HPos::Center, TEXT, SIZE)?;
    write(&area, &format!("{y}, logarithmic scale"), (10, 44), HPos::Left, TEXT, SIZE)?;
    for (x, text) in across.ticks() {
        stroke(&area, vec![(x, up.pixels.0), (x, up.pixels.1)], TEXT.mix(0.35).stroke_width(1))?;
        write(&area, &text, (x, up.pixels.0 + 16), HPos::Center, TEXT, SIZE)?;
    }
    for (y, text) in up.ticks() {
        stroke(&area, vec![(across.pixels.0, y), (across.pixels.1, y)], TEXT.mix(0.35).stroke_width(1))?;
        write(&area, &text, (across.pixels.0 - 8, y), HPos::Right, TEXT, SIZE)?;
    }
    let pixel = |&(x, y): &(f64, f64)| (across.at(x), up.at(y));
    for line in &lines {
        stroke(&area, line.points.iter().map(pixel).collect(), line.colour.stroke_width(2))?;
        for point in &line.points {
            area.draw(&Circle::new(pixel(point), 3, line.colour.filled()))?;
        }
    }
    // At the ends of the lines, moved apart where they would lie on each other.
    let ends = lines.iter().filter_map(|line| Some((line, pixel(line.points.last()?))));
    let mut ends: Vec<_> = ends.map(|(line, (x, y))| (line, x, y)).collect();
    ends.sort_by_key(|end| end.2);
    let mut lowest = i32::MIN;
    for (line, x, y) in ends {
        let free = y.max(lowest.saturating_add(SIZE + 2));
        lowest = free;
        let label = across.pixels.1 + 14;
        stroke(&area, vec![(x + 4, y), (label - 4, free)], line.colour.mix(0.5).stroke_width(1))?;
        write(&area, &line.label, (label, free), HPos::Left, line.colour, SIZE)?;
    }
    area.present()?;
    Ok(())
}
